"""What is emitted: vector instructions, the register tile that all dense passes share, and how they are called."""
