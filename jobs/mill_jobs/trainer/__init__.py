"""What a trainer needs beside the annotations."""
