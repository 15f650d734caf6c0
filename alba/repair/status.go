package repair

import (
	"context"
	"maps"
	"slices"
	"strings"
	"time"

	"scoria/alba"
	"scoria/alba/asd"
)

// Status is how safe the store's objects are, and how its devices are.
type Status struct {
	Classes []Class
	Devices []DeviceStatus
	Intents int // uploads and moves under way
	Trash   int // deleted objects that still take room
}

// Class is the objects of one preset that are stored under one policy.
type Class struct {
	Preset  string
	Policy  alba.Policy
	Domain  alba.Domain
	Objects int64
	Bytes   int64 // of the objects
	// Disks counts the objects by how many more disks may die before they can't be
	// read; -1: they can't be read now.
	Disks map[int]int64
}

// DeviceStatus is one device.
type DeviceStatus struct {
	alba.Device
	Condition Condition
	Reason    string // why it is down, "" if it is not
	Since     time.Time
	Stats     asd.Stats
	Shards    int64 // that manifests speak of, and uploads and moves under way
}

// Status looks at all manifests.
func (m *Maintainer) Status(ctx context.Context) (Status, error) {
	var st Status
	classes := map[string]*Class{}
	shards, intents, err := m.references(ctx, func(man *alba.Manifest) {
		key := man.Preset + "\n" + man.Policy.String() + "\n" + man.Domain.String()
		c := classes[key]
		if c == nil {
			c = &Class{Preset: man.Preset, Policy: man.Policy, Domain: man.Domain, Disks: map[int]int64{}}
			classes[key] = c
		}
		c.Objects++
		c.Bytes += man.Size
		c.Disks[max(-1, Assess(man, m.condition).Disks)]++
	})
	if err != nil {
		return st, err
	}
	st.Intents = intents
	for _, key := range slices.Sorted(maps.Keys(classes)) {
		st.Classes = append(st.Classes, *classes[key])
	}
	for _, d := range m.p.Fleet().Members() {
		reason, since := d.Down()
		stats, _ := d.Stats()
		rec := d.Record()
		st.Devices = append(st.Devices, DeviceStatus{Device: rec, Condition: m.condition(rec.ID), Reason: reason, Since: since, Stats: stats, Shards: shards[rec.ID]})
	}
	slices.SortFunc(st.Devices, func(a, b DeviceStatus) int { return strings.Compare(a.ID, b.ID) })
	return st, alba.Each(ctx, m.reg, alba.TrashPrefix, func(alba.KV) error { st.Trash++; return nil })
}
