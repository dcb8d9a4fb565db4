"""Run beside training, needed by no reader of a model: options, report, explain, bench, compare."""
