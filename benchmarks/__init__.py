"""Speed, measured side by side in one run; each prints machine, versions, medians and spread, and writes JSON."""
