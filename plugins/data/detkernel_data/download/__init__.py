"""Published data sets, fetched: `detkernel download NAME`."""
