"""Score a model on a task, by generated answers or by the likelihood of the answers."""
