"""What tracelens costs, measured beside other ways to do the same."""
