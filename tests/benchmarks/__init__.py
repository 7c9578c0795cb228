"""`make bench`: how near the router comes to what the kernel allows, as ratios to a server in C beside it."""
