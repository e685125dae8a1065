"""Claims of the paper and of this project's README, and what the rows say of them."""
