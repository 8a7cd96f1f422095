"""What the tests share: the peers, reference nets and oracles, none of it used by the package."""
