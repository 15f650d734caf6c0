package limit

import (
	"fmt"
	"math"
)

// Bounds of what can be set. The least rates keep a mistyped limit from stopping
// a guest for hours with one request.
const (
	MinBPS   = 4096         // bytes per second
	MaxRate  = 1 << 40      // requests or bytes per second
	MinBurst = 0.01         // seconds
	MaxBurst = 3600.0       // seconds
	MaxDepth = uint64(1e15) // requests or bytes
	noBurst  = 0.1          // seconds of credit if no burst is set
	second   = int64(1e9)   // ns
)

// Settings is what an operator sets on a pool or a volume. A field that is nil is
// not set: a volume then takes its pool's, a pool has none. Zero is set, and says
// that there is no limit.
type Settings struct {
	ReadIOPS  *uint64 `json:"read_iops,omitempty"`  // requests per second
	WriteIOPS *uint64 `json:"write_iops,omitempty"` // discards and zeroing count too
	TotalIOPS *uint64 `json:"total_iops,omitempty"` // of both together
	ReadBPS   *uint64 `json:"read_bps,omitempty"`   // bytes per second
	WriteBPS  *uint64 `json:"write_bps,omitempty"`
	TotalBPS  *uint64 `json:"total_bps,omitempty"`

	// Burst is how many seconds' worth of each rate may pass at once after a rest;
	// not set or 0: a tenth of a second's.
	Burst *float64 `json:"burst_seconds,omitempty"`
	// BurstRequests and BurstBytes say the same as an amount, for the limits on
	// requests and on bytes; where they are not 0, they go before Burst.
	BurstRequests *uint64 `json:"burst_requests,omitempty"`
	BurstBytes    *uint64 `json:"burst_bytes,omitempty"`
}

// Names of the settings, as in their JSON.
var Names = []string{
	"read_iops", "write_iops", "total_iops", "read_bps", "write_bps", "total_bps",
	"burst_seconds", "burst_requests", "burst_bytes",
}

// number returns the field with that name; nil for burst_seconds and what there
// isn't.
func (s *Settings) number(name string) **uint64 {
	switch name {
	case "read_iops":
		return &s.ReadIOPS
	case "write_iops":
		return &s.WriteIOPS
	case "total_iops":
		return &s.TotalIOPS
	case "read_bps":
		return &s.ReadBPS
	case "write_bps":
		return &s.WriteBPS
	case "total_bps":
		return &s.TotalBPS
	case "burst_requests":
		return &s.BurstRequests
	case "burst_bytes":
		return &s.BurstBytes
	}
	return nil
}

// SetNumber sets the named setting, but for burst_seconds.
func (s *Settings) SetNumber(name string, v uint64) error {
	f := s.number(name)
	if f == nil {
		return fmt.Errorf("limit %q: is not one of %v that takes a whole number", name, Names)
	}
	*f = &v
	return nil
}

// Unset makes the named setting unset. It fails for a name that there isn't.
func (s *Settings) Unset(name string) error {
	if f := s.number(name); f != nil {
		*f = nil
		return nil
	}
	if name != "burst_seconds" {
		return fmt.Errorf("limit %q: must be one of %v", name, Names)
	}
	s.Burst = nil
	return nil
}

// Over returns s with what it doesn't set taken from base.
func (s Settings) Over(base Settings) Settings {
	for _, name := range Names {
		if f := s.number(name); f != nil && *f == nil {
			*f = *base.number(name)
		}
	}
	if s.Burst == nil {
		s.Burst = base.Burst
	}
	return s
}

// Value returns a setting as text with its unit left out, and whether it is set.
func (s Settings) Value(name string) (string, bool) {
	if f := s.number(name); f != nil {
		if *f == nil {
			return "", false
		}
		return fmt.Sprint(**f), true
	}
	if name != "burst_seconds" || s.Burst == nil {
		return "", false
	}
	return fmt.Sprint(*s.Burst), true
}

// IsZero reports whether nothing is set.
func (s Settings) IsZero() bool { return s == Settings{} }

// Check names the first setting that is out of bounds and what would be right.
func (s Settings) Check() error {
	for _, name := range Names {
		f := s.number(name)
		if f == nil || *f == nil || **f == 0 {
			continue
		}
		v := **f
		switch name {
		case "read_bps", "write_bps", "total_bps":
			if v < MinBPS || v > MaxRate {
				return fmt.Errorf("limit %s %d: must be 0 (none) or from %d to %d bytes per second", name, v, MinBPS, uint64(MaxRate))
			}
		case "burst_requests", "burst_bytes":
			if v > MaxDepth {
				return fmt.Errorf("limit %s %d: must be at most %d", name, v, MaxDepth)
			}
		default:
			if v > MaxRate {
				return fmt.Errorf("limit %s %d: must be 0 (none) or at most %d requests per second", name, v, uint64(MaxRate))
			}
		}
	}
	if b := s.Burst; b != nil && *b != 0 && (math.IsNaN(*b) || *b < MinBurst || *b > MaxBurst) {
		return fmt.Errorf("limit burst_seconds %v: must be 0 (the default, %v) or from %v to %v seconds", *b, noBurst, MinBurst, MaxBurst)
	}
	return nil
}

// limits returns rate and depth of each bucket, from valid settings.
func (s Settings) limits() (list [kinds]rate) {
	value := func(p *uint64) uint64 {
		if p == nil {
			return 0
		}
		return *p
	}
	burst := noBurst
	if s.Burst != nil && *s.Burst != 0 {
		burst = *s.Burst
	}
	for k, r := range map[kind]*uint64{
		{reads, inRequests}: s.ReadIOPS, {writes, inRequests}: s.WriteIOPS, {both, inRequests}: s.TotalIOPS,
		{reads, inBytes}: s.ReadBPS, {writes, inBytes}: s.WriteBPS, {both, inBytes}: s.TotalBPS,
	} {
		amount := value(s.BurstRequests)
		if k.unit == inBytes {
			amount = value(s.BurstBytes)
		}
		l := rate{perSecond: value(r)}
		switch {
		case l.perSecond == 0:
		case amount != 0:
			l.depth = scale(amount, uint64(second), l.perSecond)
		default:
			l.depth = int64(burst * float64(second))
		}
		if k.unit == inRequests && l.perSecond > 0 {
			l.depth = max(l.depth, scale(1, uint64(second), l.perSecond)) // room for one
		}
		list[k.index()] = l
	}
	return list
}

// rate is a bucket's: perSecond 0 is no limit, depth how long a full bucket lasts
// at the rate, in ns.
type rate struct {
	perSecond uint64
	depth     int64
}

// Numbers returns the settings that are set and not 0, by name.
func (s Settings) Numbers() map[string]float64 {
	m := map[string]float64{}
	for _, name := range Names {
		if f := s.number(name); f != nil && *f != nil && **f != 0 {
			m[name] = float64(**f)
		}
	}
	if s.Burst != nil && *s.Burst != 0 {
		m["burst_seconds"] = *s.Burst
	}
	return m
}
