package place_test

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"scoria/alba"
	"scoria/alba/place"
)

func device(i, hosts, racks int) place.Device {
	h := i % hosts
	return place.Device{
		Device: alba.Device{ID: fmt.Sprintf("disk-%d", i), Host: fmt.Sprint("h", h), Rack: fmt.Sprint("r", h%racks), Datacentre: "dc", State: alba.DeviceActive},
		Free:   100 << 30, Capacity: 200 << 30, Usable: true,
	}
}

func draw(rt *rapid.T) (*alba.Preset, []place.Device, alba.ID) {
	k, m := rapid.IntRange(1, 8).Draw(rt, "k"), rapid.IntRange(0, 4).Draw(rt, "m")
	p := &alba.Preset{Name: "p", Domain: alba.Domain(rapid.IntRange(0, 3).Draw(rt, "domain")), FragmentBytes: 1 << 20}
	p.Policies = append(p.Policies, alba.Policy{K: k, M: m, C: rapid.IntRange(k, k+m).Draw(rt, "c"), X: rapid.IntRange(1, k+m).Draw(rt, "x")})
	p.Policies = append(p.Policies, alba.Policy{K: 1, M: 1, C: 1, X: 1})
	hosts, racks := rapid.IntRange(1, 6).Draw(rt, "hosts"), rapid.IntRange(1, 3).Draw(rt, "racks")
	devices := make([]place.Device, rapid.IntRange(1, 16).Draw(rt, "devices"))
	for i := range devices {
		devices[i] = device(i, hosts, racks)
		devices[i].Free = rapid.Int64Range(0, 1<<40).Draw(rt, "free")
		devices[i].Usable = rapid.IntRange(0, 3).Draw(rt, "usable") > 0
	}
	var seed alba.ID
	copy(seed[:], rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(rt, "seed"))
	return p, devices, seed
}

// possible is how many shards can be placed: per domain x, per disk one, or x of
// the domains are the disks.
func possible(pol alba.Policy, domain alba.Domain, devices []place.Device) int {
	room := map[string]int{}
	for _, d := range devices {
		if d.Usable {
			per := 1
			if domain == alba.DomainDisk {
				per = pol.X
			}
			room[d.DomainName(domain)] = min(pol.X, room[d.DomainName(domain)]+per)
		}
	}
	n := 0
	for _, r := range room {
		n += r
	}
	return min(n, pol.Shards())
}

func count(shards []string) int {
	return len(shards) - len(slices.DeleteFunc(slices.Clone(shards), func(s string) bool { return s != "" }))
}

// TestChoose: the first policy that can be met is chosen, with as many shards as the
// devices allow, never more than x in a domain, only on usable devices, and
// whatever the order of the devices.
func TestChoose(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		p, devices, seed := draw(rt)
		c, err := place.Choose(p, devices, seed)
		want := slices.IndexFunc(p.Policies, func(pol alba.Policy) bool { return possible(pol, p.Domain, devices) >= pol.C })
		if want < 0 {
			if !errors.Is(err, place.ErrUnsatisfiable) {
				rt.Fatalf("chose %v: %v", c, err)
			}
			return
		}
		if err != nil || c.Index != want {
			rt.Fatalf("chose %v, want policy %d: %v", c, want, err)
		}
		all := slices.Clone(devices)
		for i := range all {
			all[i].Usable = true
		}
		best := slices.IndexFunc(p.Policies, func(pol alba.Policy) bool { return possible(pol, p.Domain, all) >= pol.C })
		if got := c.Lesser(p, devices, seed); got != (best < c.Index) {
			rt.Fatalf("policy %d is a lesser one: %v, policy %d would be met by all devices", c.Index, got, best)
		}
		if got, want := count(c.Shards), possible(c.Policy, p.Domain, devices); got != want {
			rt.Fatalf("%d shards placed, %d are possible: %q", got, want, c.Shards)
		}
		if !place.Valid(c.Policy, p.Domain, c.Shards, devices) {
			rt.Fatalf("more than x in a domain: %q", c.Shards)
		}
		for _, s := range c.Shards {
			if s != "" && !devices[slices.IndexFunc(devices, func(d place.Device) bool { return d.ID == s })].Usable {
				rt.Fatalf("%s is not usable", s)
			}
		}
		slices.Reverse(devices)
		if again, err := place.Choose(p, devices, seed); err != nil || !slices.Equal(again.Shards, c.Shards) {
			rt.Fatalf("chose %q, then %q: %v", c.Shards, again.Shards, err)
		}
	})
}

// TestRefill: shards that have a device keep it, the others get one wherever the
// rules allow.
func TestRefill(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		p, devices, seed := draw(rt)
		c, err := place.Choose(p, devices, seed)
		if err != nil {
			return
		}
		lost := slices.Clone(c.Shards)
		for i := range lost {
			if rapid.Bool().Draw(rt, "lost") {
				lost[i] = ""
			}
		}
		got, missing := place.Refill(c.Policy, p.Domain, lost, devices, seed)
		if !place.Valid(c.Policy, p.Domain, got, devices) {
			rt.Fatalf("more than x in a domain: %q", got)
		}
		for i, s := range lost {
			if s != "" && got[i] != s {
				rt.Fatalf("shard %d moved from %s to %s", i, s, got[i])
			}
		}
		if missing != len(got)-count(got) || count(got) < count(lost) {
			rt.Fatalf("missing %d of %q", missing, got)
		}
		// All that were lost can come back: their places are free.
		if count(got) < count(c.Shards) {
			rt.Fatalf("%d shards after refill, %d before the loss", count(got), count(c.Shards))
		}
	})
}

// TestMinimalMovement: a new device takes about its share of the shards, and no
// shard moves between the others; the same for one that goes.
func TestMinimalMovement(t *testing.T) {
	p := &alba.Preset{Name: "p", Policies: []alba.Policy{{K: 3, M: 1, C: 4, X: 1}}, FragmentBytes: 1 << 20}
	var devices []place.Device
	for i := range 9 {
		devices = append(devices, device(i, 9, 1))
	}
	const objects = 2000
	onNew := 0
	for i := range objects {
		seed := alba.ID{byte(i), byte(i >> 8)}
		before, err := place.Choose(p, devices[:8], seed)
		if err != nil {
			t.Fatal(err)
		}
		after, err := place.Choose(p, devices, seed)
		if err != nil {
			t.Fatal(err)
		}
		moved := 0
		for _, s := range after.Shards {
			if s == "disk-8" {
				onNew++
			} else if !slices.Contains(before.Shards, s) {
				moved++
			}
		}
		if moved > 0 {
			t.Fatalf("object %d moved from %q to %q", i, before.Shards, after.Shards)
		}
	}
	if share := float64(onNew) / (4 * objects); share < 0.09 || share > 0.13 {
		t.Fatalf("the new device of nine holds %.3f of all shards", share)
	}
}

// TestWeights: shards come in proportion to free space.
func TestWeights(t *testing.T) {
	p := &alba.Preset{Name: "p", Policies: []alba.Policy{{K: 1, M: 0, C: 1, X: 1}}, FragmentBytes: 1 << 20}
	var devices []place.Device
	for i := range 4 {
		d := device(i, 4, 1)
		d.Free = int64(i+1) << 30
		devices = append(devices, d)
	}
	got := map[string]int{}
	const objects = 10_000
	for i := range objects {
		c, err := place.Choose(p, devices, alba.ID{byte(i), byte(i >> 8)})
		if err != nil {
			t.Fatal(err)
		}
		got[c.Shards[0]]++
	}
	for i := range devices {
		want := float64(i+1) / 10
		if share := float64(got[devices[i].ID]) / objects; share < want-0.02 || share > want+0.02 {
			t.Errorf("%s holds %.3f, want %.3f", devices[i].ID, share, want)
		}
	}
}
