"""The operator's side: what talks to a Kubernetes cluster. Of `mill_jobs` it knows the configuration alone."""
