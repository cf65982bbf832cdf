"""VL-PLM and MarvelOVD: class-agnostic proposals, named by CLIP."""
