// Package place decides which devices hold an object's shards. It is pure: from a
// preset and the devices' states to devices, the same for the same arguments.
//
// Devices are ranked per object by weighted rendezvous hashing: each gets the score
// -w/ln(h), with h a hash of the object's seed and the device's ID in (0,1) and w its
// free space; the largest scores win. So shards are spread in proportion to free
// space, and a device that comes or goes moves only what goes to or comes from
// it. The ranked devices are taken in rounds: at most one shard per failure domain,
// then at most two, up to x; so shards are spread as widely as the domains allow.
package place

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"

	"scoria/alba"
)

// ErrUnsatisfiable: no policy of the preset can be met by the devices.
var ErrUnsatisfiable = errors.New("too few devices for the preset")

// Device is what placement knows of a device.
type Device struct {
	alba.Device
	Free     int64 // bytes that may still be put there
	Capacity int64 // bytes
	Usable   bool  // up, active and not full: may be given new shards
}

// Choice is where the shards of an object go.
type Choice struct {
	Index  int // of the policy in the preset
	Policy alba.Policy
	Shards []string // device IDs; "" where there is none
}

// Choose takes the first policy for which c shards can be placed. Shards beyond
// that are placed as far as the devices allow; parity is what is left out.
func Choose(p *alba.Preset, devices []Device, seed alba.ID) (Choice, error) {
	ranked := rank(devices, seed)
	for i, pol := range p.Policies {
		shards := make([]string, pol.Shards())
		if fill(shards, pol, p.Domain, ranked, nil) >= pol.C {
			return Choice{Index: i, Policy: pol, Shards: shards}, nil
		}
	}
	last := p.Policies[len(p.Policies)-1]
	return Choice{}, fmt.Errorf("preset %s: %d of %d devices are usable; policy %v needs %d, at most %d per %v: %w",
		p.Name, len(ranked), len(devices), last, last.C, last.X, p.Domain, ErrUnsatisfiable)
}

// Lesser says whether c is under a policy that is only second best for these devices:
// if all active ones were usable, one before it could be met.
func (c *Choice) Lesser(p *alba.Preset, devices []Device, seed alba.ID) bool {
	if c.Index == 0 {
		return false
	}
	all := slices.Clone(devices)
	for i := range all {
		all[i].Usable = all[i].State == alba.DeviceActive
	}
	best, err := Choose(p, all, seed)
	return err == nil && best.Index < c.Index
}

// Refill gives devices to the shards that have none (""); the others stay. It
// returns the new list and how many are still without. Devices that are in
// shards but not usable count against their domains, and are not given another.
func Refill(pol alba.Policy, domain alba.Domain, shards []string, devices []Device, seed alba.ID) ([]string, int) {
	shards = slices.Clone(shards)
	n := fill(shards, pol, domain, rank(devices, seed), devices)
	return shards, len(shards) - n
}

// Valid says whether shards keep x per domain, as far as the devices are known.
func Valid(pol alba.Policy, domain alba.Domain, shards []string, devices []Device) bool {
	count := map[string]int{}
	perDevice := map[string]int{}
	for _, id := range shards {
		if id == "" {
			continue
		}
		perDevice[id]++
		if perDevice[id] > maxPerDevice(pol, domain) {
			return false
		}
		if i := slices.IndexFunc(devices, func(d Device) bool { return d.ID == id }); i >= 0 {
			name := devices[i].DomainName(domain)
			if count[name]++; count[name] > pol.X {
				return false
			}
		}
	}
	return true
}

// maxPerDevice: more than one shard of an object on a disk only where the policy
// counts disks and says so.
func maxPerDevice(pol alba.Policy, domain alba.Domain) int {
	if domain == alba.DomainDisk {
		return pol.X
	}
	return 1
}

// fill gives ranked devices to the empty shards and returns how many shards have
// one then. known holds the devices of those that have one already.
func fill(shards []string, pol alba.Policy, domain alba.Domain, ranked, known []Device) int {
	inDomain, onDevice := map[string]int{}, map[string]int{}
	filled := 0
	for _, id := range shards {
		if id == "" {
			continue
		}
		filled++
		onDevice[id]++
		if i := slices.IndexFunc(known, func(d Device) bool { return d.ID == id }); i >= 0 {
			inDomain[known[i].DomainName(domain)]++
		}
	}
	next := 0
	for limit := 1; limit <= pol.X; limit++ {
		// A disk is given a second shard only after every disk has a first.
		perDevice := min(limit, maxPerDevice(pol, domain))
		for i := range ranked {
			for next < len(shards) && shards[next] != "" {
				next++
			}
			if next == len(shards) {
				return filled
			}
			d := &ranked[i]
			name := d.DomainName(domain)
			if inDomain[name] >= limit || onDevice[d.ID] >= perDevice {
				continue
			}
			inDomain[name]++
			onDevice[d.ID]++
			shards[next] = d.ID
			filled++
		}
	}
	return filled
}

// rank returns the usable devices, best first.
func rank(devices []Device, seed alba.ID) []Device {
	type scored struct {
		d     Device
		score float64
	}
	list := make([]scored, 0, len(devices))
	for _, d := range devices {
		if d.Usable {
			list = append(list, scored{d, score(seed, d.ID, d.Free)})
		}
	}
	slices.SortFunc(list, func(a, b scored) int {
		return cmp.Or(cmp.Compare(b.score, a.score), cmp.Compare(a.d.ID, b.d.ID))
	})
	out := make([]Device, len(list))
	for i := range list {
		out[i] = list[i].d
	}
	return out
}

// score is -w/ln(h): of n devices the largest score is a device's with probability
// w/sum(w). A device without a byte free still can be chosen, last.
func score(seed alba.ID, id string, free int64) float64 {
	sum := sha256.Sum256(append(seed[:], id...))
	h := binary.LittleEndian.Uint64(sum[:])
	u := (float64(h>>11) + 0.5) / (1 << 53) // in (0,1)
	return -float64(max(free, 1)) / math.Log(u)
}
