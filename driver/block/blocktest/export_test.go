package blocktest

import "time"

// SetPatience shortens the suite's waits for devices that are known to hang.
func SetPatience(d time.Duration) { patience = d }
