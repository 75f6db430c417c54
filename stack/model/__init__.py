"""The decoder: readable in one sitting, single-device, initialised in one place."""
