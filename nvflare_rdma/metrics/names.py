"""The name that the recorder and the reader of its lines share."""

FILE_NAME = "traffic.jsonl"
