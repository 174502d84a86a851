"""What several tests take: small networks, files, commands, rules."""
