"""What runs programs: the executor, compiled bodies and where they are kept, memory, and what machine this is."""
