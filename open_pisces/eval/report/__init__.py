"""Reports over many run folders: tables, charts and published baselines."""
