"""What single transfers of a job did: `reporting` shows their records where FLARE's users look, with `pools`."""
