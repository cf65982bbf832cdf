"""Big frozen models: protocols with numpy in and numpy out, one adapter a family. The only home of torch."""
