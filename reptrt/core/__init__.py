"""The floor everything stands on: errors, choices, artifacts, metrics, the INT8 grid."""
