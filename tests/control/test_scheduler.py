"""What the scheduler does about each event."""

from __future__ import annotations

from dataclasses import replace

import pytest

from prefect_slo.control import StageRule
from prefect_slo.control import events as e
from prefect_slo.resources import Size

RULE = StageRule("process", Size(1, 1024), workers=2)


def of(kind: type, actions: list[e.Action]) -> list:
    return [action for action in actions if isinstance(action, kind)]


def test_a_stage_opens_as_many_leases_as_its_rule_allows_and_no_more_than_it_has_items(world):
    assert len(of(e.OpenLease, world.start(replace(RULE, workers=4), 3))) == 3
    assert len(of(e.OpenLease, world.start(replace(RULE, workers=4), 9, "other"))) == 4


def test_items_run_in_the_order_of_their_submission(world):
    world.start(replace(RULE, workers=1), 50)
    world.run_dry()
    sent = [item for dispatch in of(e.Dispatch, world.actions) for item in dispatch.items]
    assert sent == sorted(sent)
    assert set(world.endings().values()) == {"done"}


def test_nothing_is_bundled_before_an_item_was_measured(world):
    world.start(replace(RULE, workers=1), 100)
    first = of(e.Dispatch, world.up(1))
    assert [len(dispatch.items) for dispatch in first] == [1]
    assert len(of(e.Dispatch, world.finish(1, busy_s=1e-4))[0].items) > 10


def test_a_fixed_bundle_is_kept_from_the_first_dispatch(world):
    world.start(replace(RULE, workers=1, bundle=7), 10)
    assert [len(d.items) for d in of(e.Dispatch, world.up(1))] == [7]
    assert [len(d.items) for d in of(e.Dispatch, world.finish(1))] == [3]


def test_items_that_wait_for_upstream_run_once_they_are_ready(world):
    world.tell(e.PlanChanged("work", RULE))
    assert not of(e.OpenLease, world.tell(e.Submitted("work", (1, 2), ready=False)))
    assert len(of(e.OpenLease, world.tell(e.Ready((2,))))) == 1
    world.run_dry()
    assert world.endings() == {2: "done"}


def test_a_stage_without_a_limit_opens_more_leases_while_its_items_block(world):
    world.start(StageRule("thread"), 100)
    for lease in world.opening():
        world.up(lease)
    assert len(world.leases) == 16
    world.tick()
    assert len(world.leases) == 32
    for lease in world.opening():
        world.up(lease)
    world.tick()
    assert len(world.leases) == 64


def test_a_stage_of_tiny_items_does_not_open_more(world):
    world.start(StageRule("thread"), 5000)
    for lease in world.opening():
        world.up(lease)
    for _ in range(20):
        world.finish(world.busy()[0], 0.001)
    assert len(world.leases) <= 17


def test_an_idle_lease_lingers_and_is_then_given_back(world):
    world.start(replace(RULE, workers=1), 1)
    world.up(1)
    assert not of(e.CloseLease, world.finish(1))
    assert len(of(e.CloseLease, world.tick())) == 1
    assert not world.scheduler.leased


def test_an_idle_lease_makes_room_for_another_stage_at_once(make_world):
    world = make_world({"process": 1.0})
    world.start(RULE, 1)
    world.up(1)
    world.finish(1)
    actions = world.start(RULE, 1, "next")
    assert [type(action) for action in actions] == [e.CloseLease, e.OpenLease]


def test_a_lease_larger_than_the_machine_runs_alone(make_world):
    world = make_world({"process": 2.0})
    world.start(replace(RULE, size=Size(4, 1024)), 3)
    world.run_dry()
    assert len(world.settled) == 3


def test_a_more_urgent_stage_takes_the_next_free_worker(make_world):
    world = make_world({"process": 1.0})
    world.start(replace(RULE, bundle=1), 10, "early")
    world.up(1)
    world.start(replace(RULE, priority=1.0), 1, "late")
    actions = world.finish(1)
    assert [a.stage for a in of(e.OpenLease, actions)] == ["late"]
    world.run_dry()
    assert len(world.settled) == 11


def test_a_wide_urgent_lease_is_not_starved_by_narrow_ones(make_world):
    world = make_world({"process": 2.0})
    world.start(replace(RULE, bundle=1), 10, "narrow")
    world.up(1)
    world.up(2)
    world.start(replace(RULE, priority=1.0, size=Size(2, 1024)), 1, "wide")
    assert not of(e.OpenLease, world.finish(1))
    assert [a.stage for a in of(e.OpenLease, world.finish(2))] == ["wide"]


def test_stages_of_one_task_share_its_limit_and_others_do_not(world):
    limited = replace(RULE, workers=2, bundle=1, task="limited", together=2)
    world.start(limited, 10, "here")
    assert len(of(e.OpenLease, world.actions)) == 2
    assert not of(e.OpenLease, world.start(replace(limited, priority=1.0), 2, "there"))
    assert len(of(e.OpenLease, world.start(replace(RULE, task="free"), 2, "elsewhere"))) == 2
    assert [a.stage for a in of(e.OpenLease, world.up(1))] == ["there"], "the more urgent stage has the first one"
    world.run_dry()
    assert set(world.endings().values()) == {"done"}
    assert len(world.settled) == 14


def test_no_worker_is_given_back_where_that_would_not_be_enough(make_world):
    world = make_world({"process": 1.0})
    limited = StageRule("thread", workers=1, task="limited", together=1)
    world.start(limited, 1, "holds the limit")
    world.up(1)
    world.start(replace(RULE, bundle=1), 9, "low")
    world.up(2)
    world.start(replace(limited, pool="process", priority=1.0), 1, "wants both")
    actions = world.finish(2)
    assert [d.stage for d in of(e.Dispatch, actions)] == ["low"]
    assert not of(e.CloseLease, actions)
    world.run_dry()
    assert len(world.settled) == 11


@pytest.mark.parametrize(("retries", "runs", "ending"), [(0, 1, "died"), (2, 3, "died")])
def test_an_item_runs_again_as_often_as_its_rule_allows(world, retries, runs, ending):
    world.start(replace(RULE, workers=1, loss_retries=retries), 1)
    for lease in range(1, runs + 1):
        world.up(lease)
        world.lose(lease)
    assert world.endings() == {0: ending}
    assert world.settled[0].attempts == runs == world.runs[0]


def test_items_that_were_never_started_run_again_without_counting(world):
    world.start(replace(RULE, workers=1, bundle=4), 4)
    world.up(1)
    world.lose(1, done=1, running=1)
    assert world.endings() == {0: "done", 1: "died"}
    world.run_dry()
    assert world.endings() == {0: "done", 1: "died", 2: "done", 3: "done"}


def test_running_out_of_memory_moves_up_the_ladder(world):
    bigger = Size(1, 4096)
    world.start(replace(RULE, workers=1, loss_retries=1, ladder=(bigger,)), 1)
    world.up(1)
    actions = world.lose(1, "memory")
    assert of(e.Notice, actions)[0].what == "grown"
    assert of(e.OpenLease, actions)[0].size == bigger
    world.run_dry()
    assert world.endings() == {0: "done"}


def test_two_workers_that_run_out_of_memory_climb_one_step_only(world):
    ladder = (Size(1, 2048), Size(1, 4096))
    world.start(replace(RULE, loss_retries=3, ladder=ladder), 2)
    world.up(1)
    world.up(2)
    world.lose(1, "memory")
    world.lose(2, "memory")
    assert {a.size for a in of(e.OpenLease, world.actions)} == {RULE.size, ladder[0]}


def test_without_a_ladder_out_of_memory_ends_the_item_even_with_retries(world):
    world.start(replace(RULE, workers=1, loss_retries=5), 1)
    world.up(1)
    world.lose(1, "memory")
    assert world.endings() == {0: "memory"}


def test_a_timed_out_item_ends_and_its_neighbours_run_elsewhere(world):
    world.start(replace(RULE, workers=1, bundle=3), 3)
    world.up(1)
    world.lose(1, "timeout")
    world.run_dry()
    assert world.endings() == {0: "timeout", 1: "done", 2: "done"}


def test_arguments_that_do_not_pickle_move_the_stage_to_its_fallback_with_one_notice(world):
    world.start(replace(RULE, fallback="thread", bundle=1), 6)
    world.up(1)
    world.up(2)
    world.reject(1, ran=False)
    world.finish(1, 0.0)
    world.reject(2, ran=False)
    world.run_dry()
    assert set(world.endings().values()) == {"done"}
    assert len(world.settled) == 6
    assert len(of(e.Notice, world.actions)) == 1


def test_a_rejected_bundle_says_nothing_of_item_times(world):
    world.start(replace(RULE, workers=1, fallback="thread"), 100)
    world.up(1)
    world.reject(1, ran=False)
    world.finish(1, 0.0)
    lease = world.opening()[0]
    assert [len(d.items) for d in of(e.Dispatch, world.up(lease))] == [1]


@pytest.mark.parametrize("ran", [True, False])
def test_a_pinned_stage_ends_what_does_not_pickle(world, ran):
    world.start(replace(RULE, workers=1), 2)
    world.up(1)
    world.reject(1, ran=ran)
    world.run_dry()
    assert world.endings() == {0: "unpicklable", 1: "done"}


def test_a_result_that_does_not_pickle_is_not_made_again_where_that_is_forbidden(world):
    world.start(replace(RULE, workers=1, fallback="thread", rerun_unpicklable=False), 1)
    world.up(1)
    world.reject(1, ran=True)
    assert world.endings() == {0: "unpicklable"}


def test_an_item_rejected_by_a_lease_that_is_lost_next_runs_once(world):
    world.start(replace(RULE, workers=1, fallback="thread", bundle=2), 2)
    world.up(1)
    world.reject(1, ran=False)
    world.lose(1, running=0)
    world.run_dry()
    assert world.endings() == {0: "done", 1: "done"}


def test_workers_that_never_start_move_the_stage_to_its_fallback(world):
    world.start(replace(RULE, workers=1, fallback="thread"), 2)
    for lease in (1, 2, 3):
        world.lose(lease, "start", running=0)
    assert of(e.Notice, world.actions)[0].what == "fallback"
    world.run_dry()
    assert set(world.endings().values()) == {"done"}


def test_many_workers_that_fail_together_do_not_give_up_the_fallback_too(world):
    world.start(replace(RULE, workers=9, fallback="thread"), 9)
    for lease in range(1, 10):
        if lease in world.leases:
            world.lose(lease, "start", running=0)
    world.run_dry()
    assert set(world.endings().values()) == {"done"}


def test_a_program_that_kills_every_worker_before_its_first_item_ends_the_stage(world):
    world.start(replace(RULE, workers=1, loss_retries=9), 5)
    for lease in range(1, 30):
        if lease not in world.leases:
            break
        world.up(lease)
        world.lose(lease, "died", running=0)
    assert set(world.endings().values()) == {"start"}
    assert len(world.settled) == 5


def test_bundles_that_are_dropped_for_inputs_that_are_gone_say_nothing_of_the_workers(world):
    world.start(replace(RULE, workers=5, fallback="thread", bundle=1), 5)
    leases = tuple(world.leases)
    for lease in leases:
        world.up(lease)
    for lease in leases:
        world.lose(lease, running=0, inputs_gone=True)
    assert not of(e.Notice, world.actions)
    world.run_dry()
    assert set(world.endings().values()) == {"done"}


def test_a_new_rule_takes_effect_as_leases_get_free(world):
    world.start(replace(RULE, workers=2, bundle=1), 10)
    world.up(1)
    world.up(2)
    world.tell(e.PlanChanged("work", replace(RULE, workers=1, bundle=1, size=Size(1, 2048))))
    assert len(world.busy()) == 2
    world.finish(1)
    assert of(e.CloseLease, world.actions)
    world.run_dry()
    assert len(world.settled) == 10


def test_fewer_workers_of_the_same_size_means_fewer_leases(world):
    world.start(replace(RULE, workers=4, bundle=1), 40)
    for lease in (1, 2, 3, 4):
        world.up(lease)
    world.tell(e.PlanChanged("work", replace(RULE, workers=2, bundle=1)))
    for lease in (1, 2, 3, 4):
        world.finish(lease)
    assert len(world.leases) == 2


def test_cancelled_items_do_not_run_and_their_neighbours_do(world):
    world.start(replace(RULE, workers=1, bundle=2), 6)
    world.up(1)
    world.tell(e.Cancel((1, 3)))
    assert world.endings() == {3: "cancelled"}
    world.run_dry()
    assert world.endings() == {0: "done", 1: "done", 2: "done", 3: "cancelled", 4: "done", 5: "done"}


def test_a_bundle_whose_items_are_all_cancelled_is_ended(world):
    world.start(replace(RULE, workers=1, bundle=2, loss_retries=9), 3)
    world.up(1)
    assert of(e.CancelBundle, world.tell(e.Cancel((0, 1))))
    world.run_dry()
    assert world.endings() == {0: "cancelled", 1: "cancelled", 2: "done"}


def test_what_was_submitted_before_closing_runs_to_its_end(world):
    world.start(replace(RULE, workers=1, bundle=1), 3)
    world.up(1)
    world.tell(e.Submitted("work", (3,), ready=False))
    world.tell(e.Closed())
    world.run_dry()
    assert world.endings() == {0: "done", 1: "done", 2: "done"}
    world.tell(e.Ready((3,)))
    world.run_dry()
    assert world.endings()[3] == "done"
    assert not world.scheduler.leased


def test_after_closing_workers_that_are_not_there_yet_are_not_waited_for(world):
    world.start(RULE, 2)
    world.up(1)
    assert of(e.OpenLease, world.tell(e.Submitted("work", (2,), ready=False))) == []
    world.finish(1)
    world.finish(1)
    world.tell(e.Closed())
    assert world.opening() == []
    assert world.leases.keys() == {1}


def test_after_closing_the_last_idle_worker_is_given_back_at_once(world):
    world.start(replace(RULE, workers=1), 1)
    world.up(1)
    world.tell(e.Closed())
    world.finish(1)
    assert not world.scheduler.leased


def test_closing_at_once_ends_what_runs_and_cancels_the_rest(world):
    world.start(replace(RULE, workers=1, loss_retries=9, bundle=1), 2)
    world.up(1)
    world.tell(e.Closed())
    assert world.endings() == {}
    assert of(e.CancelBundle, world.tell(e.Closed(now=True)))
    assert world.endings() == {1: "cancelled"}
    world.lose(1, "cancelled")
    assert set(world.endings().values()) == {"cancelled"}
    assert not world.scheduler.leased


def test_what_is_submitted_after_closing_runs_unless_everything_was_ended(world):
    world.start(RULE, 1)
    world.tell(e.Closed())
    world.tell(e.Submitted("work", (7, 8)))
    world.run_dry()
    assert world.endings()[7] == world.endings()[8] == "done"
    world.tell(e.Closed(now=True))
    world.tell(e.Submitted("work", (9,)))
    assert world.endings()[9] == "cancelled"


def test_reports_of_leases_that_are_over_are_ignored(world):
    world.start(replace(RULE, workers=1), 1)
    world.up(1)
    world.lose(1)
    for event in (e.LeaseUp(1), e.ItemDone(1, (0,)), e.BundleDone(1, 1.0), e.Rejected(1, (0,), True)):
        assert not world.tell(event)
    assert not world.tell(e.LeaseLost(1, "died"))


TIMID = e.Kind(7, batch=1, loss_retries=0, rerun_unpicklable=False)


def test_a_bundle_holds_items_of_one_kind(world):
    world.tell(e.PlanChanged("work", replace(RULE, workers=1, bundle=4)))
    for first, kind in ((0, None), (3, TIMID), (6, None)):
        world.tell(e.Submitted("work", tuple(range(first, first + 3)), kind=kind))
    world.run_dry()
    assert [d.items for d in of(e.Dispatch, world.actions)] == [(0, 1, 2), (3, 4, 5), (6, 7, 8)]


def test_every_kind_is_retried_by_its_own_word(world):
    world.tell(e.PlanChanged("work", replace(RULE, workers=1, bundle=1, loss_retries=1)))
    world.tell(e.Submitted("work", (0,)))
    world.tell(e.Submitted("work", (1,), kind=TIMID))
    for lease in (1, 2, 3):
        world.up(lease)
        world.lose(lease)
    assert {item: settle.attempts for item, settle in world.settled.items()} == {0: 2, 1: 1}


def test_of_results_that_do_not_pickle_only_those_that_may_are_made_again(world):
    world.tell(e.PlanChanged("work", replace(RULE, workers=2, bundle=1, fallback="thread")))
    world.tell(e.Submitted("work", (0,)))
    world.tell(e.Submitted("work", (1,), kind=TIMID))
    world.up(1)
    world.up(2)
    world.reject(1, ran=True)
    world.reject(2, ran=True)
    world.run_dry()
    assert world.endings() == {0: "done", 1: "unpicklable"}
