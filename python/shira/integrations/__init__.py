"""Other frameworks that hold the model: one file or folder for each. `import shira` loads none of them."""
