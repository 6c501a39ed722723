"""The whole job: resolve, plan, merge, export, verify. The only room that knows all stages."""
