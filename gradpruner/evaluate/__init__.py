"""Score a model on a task: by the likelihood of the answers."""
