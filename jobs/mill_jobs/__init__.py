"""What runs in a pod or on a laptop: plan, label, finalize, verify, evaluate."""
