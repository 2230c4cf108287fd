"""Workers in Prefect work pools: pilots (jobs that run bundles), mailboxes, and the office that keeps them."""
