"""What is read: passages, entities, relations and the queries composed of them, shipped or of the user's."""
