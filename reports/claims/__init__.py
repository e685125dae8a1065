"""What the paper and README claim, held against stored rows: said, measured, interval, verdict."""
