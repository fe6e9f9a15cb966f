"""The routing study: every way to route, trained alike with several seeds, against what its paper claims."""
