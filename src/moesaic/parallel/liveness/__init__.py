"""Who of the ranks is still there: they find one another, and an error names the one that is gone."""
