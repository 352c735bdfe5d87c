"""The methods that GradPruner is compared with; one file a method, all on the protocol of `gradpruner.method`."""
