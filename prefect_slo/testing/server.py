"""``python -m prefect_slo.testing.server``: an endpoint that stands for AWS, with functions and jobs that really run.

For what moto can't mock inside a process: other processes, other languages, asynchronous clients. It listens on the
loopback interface, prints its address and a role on one line each, and runs until it is interrupted.
"""

from __future__ import annotations

import argparse
import logging
import signal
import socket
import threading
from contextlib import ExitStack
from pathlib import Path

from prefect_slo.errors import SloError
from prefect_slo.testing.aws.batches import LocalBatch
from prefect_slo.testing.aws.guard import fake_credentials, no_real_aws
from prefect_slo.testing.aws.kept import check_installed, role_arn
from prefect_slo.testing.aws.lambdas import LocalLambda

HOST = "127.0.0.1"


def main(arguments: list[str] | None = None) -> None:
    """Serve until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m prefect_slo.testing.server", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--concurrency", type=int, default=1000, help="invocations at once")
    parser.add_argument(
        "--cpu", choices=("shares", "modelled", "off"), default="off", help="whether CPU time takes its share"
    )
    parser.add_argument(
        "--image", action="append", default=[], metavar="URI=FOLDER", help="a folder that stands for a container image"
    )
    parser.add_argument("--own-tmp", action="store_true", help="a /tmp of its own for each sandbox")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that jobs may have")
    options = parser.parse_args(arguments)
    try:
        check_installed()
    except SloError as error:
        parser.error(str(error))
    from moto.server import ThreadedMotoServer

    images = {uri: Path(folder) for uri, _, folder in (told.partition("=") for told in options.image)}
    for uri, folder in images.items():
        if not (uri and str(folder) != "." and folder.is_dir()):
            parser.error(f"argument --image: {uri}={folder} is no URI=FOLDER with a folder that is there")
    if (why := _taken(options.port)) is not None:
        parser.error(f"argument --port: {options.port} cannot be listened on ({why}); 0 takes a free one")
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    with ExitStack() as stack:
        stack.enter_context(fake_credentials())
        stack.enter_context(no_real_aws())
        logging.getLogger("werkzeug").setLevel(logging.WARNING)
        server = ThreadedMotoServer(HOST, options.port, verbose=False)
        server.start()
        stack.callback(server.stop)
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        lambdas = LocalLambda(
            endpoint=endpoint,
            concurrency=options.concurrency,
            cpu=options.cpu,
            images=images,
            own_tmp=options.own_tmp,
        )
        stack.enter_context(lambdas)
        stack.enter_context(LocalBatch(endpoint=endpoint, gpus=options.gpus, images=images))
        print(f"AWS_ENDPOINT_URL={endpoint}\nPREFECT_SLO_TEST_ROLE={role_arn(endpoint)}", flush=True)
        ended.wait()


def _taken(port: int) -> str | None:
    """Why a port of the loopback interface can't be listened on; ``None`` where it can. moto would wait for ever."""
    try:
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((HOST, port))
    except (OSError, OverflowError) as error:
        return str(error)
    return None


if __name__ == "__main__":
    main()
