"""MLflow: where runs are kept, how they are written and found, and the report that a sweep leaves there."""
