"""The AWS edge. boto3 is imported inside the functions that call AWS, so nothing else pays for it."""
