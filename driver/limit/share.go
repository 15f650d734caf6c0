package limit

import "scoria/driver/block"

// Shared is a device under another one's limits. Safe from any goroutine.
type Shared struct {
	block.Device
	limits *Device
}

var (
	_ block.Device  = (*Shared)(nil)
	_ block.Delayer = (*Shared)(nil)
)

// Share puts dev, which is comparable and not d's own, under the limits of d. Its user
// awaits its requests before it closes dev, as with dev alone.
func (d *Device) Share(dev block.Device) *Shared { return &Shared{dev, d} }

// Submit implements block.Device.
func (s *Shared) Submit(batch []*block.Request) { s.limits.submitTo(s.Device, batch) }

// Cancel implements block.Device.
func (s *Shared) Cancel(owner any) { s.limits.cancelIn(s.Device, owner) }

// Hasten implements block.Delayer.
func (s *Shared) Hasten(owner any) { s.limits.hastenIn(s.Device, owner) }
