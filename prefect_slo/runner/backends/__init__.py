"""Where bundles run. Every backend implements ``protocol.Backend`` and passes the conformance suite."""
