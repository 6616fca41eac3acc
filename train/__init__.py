"""Training: one LightningModule, one configuration, one run folder for every architecture."""
