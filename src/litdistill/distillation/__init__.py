"""The frozen teacher, its cache, and the LightningModule that distils it into a student."""
