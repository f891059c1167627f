"""One command for each performance claim: ours and the alternative in turn, in one process."""
