"""What all other packages use: errors, options, files with sidecars, metrics, the INT8 grid."""
