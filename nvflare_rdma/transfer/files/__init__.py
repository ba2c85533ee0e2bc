"""Files from disk to disk, in parts that are verified and resumed one by one."""
