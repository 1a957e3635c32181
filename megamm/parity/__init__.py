"""Whether parallel layouts train the same: loss and gradients of each against one process."""
