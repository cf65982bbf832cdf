"""CoT-PL: regions from SAM, three questions to a vision-language model."""
