"""The methods that GradPruner is compared with: one module per method, all on the protocol of `gradpruner.method`."""
