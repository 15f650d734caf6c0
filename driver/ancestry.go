package driver

import "github.com/google/uuid"

// Ancestor is a volume that a clone builds on: the clone's SCOs up to SCO and its
// page objects up to Object, as far as no earlier ancestor has them, are that
// volume's, and Snapshot is what keeps them.
type Ancestor struct {
	Volume   uuid.UUID `json:"volume"`
	Snapshot uuid.UUID `json:"snapshot"`
	SCO      uint64    `json:"sco"`
	Object   uint32    `json:"object"`
}
