"""`clue-ds bench ...`: end-to-end comparisons with named peers; figures lie in results/."""
