"""What every part may use: errors with exit codes, files that appear whole, progress, findings, units, versions."""
