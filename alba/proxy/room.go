package proxy

import (
	"context"

	"scoria/alba"
	"scoria/alba/asd"
	"scoria/alba/erasure"
	"scoria/alba/place"
)

// RoomOn returns how many bytes an object of size bytes, put into a namespace from a file
// (Source.LocalPath), takes at most on the devices for which on is true: with the devices
// that can be used now or with all active ones, whichever takes more. These devices are
// taken to be in this process and on the file's file system, so it is 0 if one of them may
// have the file in place of a copy. It asks the registry, but no device.
func (p *Proxy) RoomOn(ctx context.Context, ns string, size int64, on func(alba.Device) bool) (int64, error) {
	var now, all []place.Device
	chosen := 0
	for _, m := range p.fleet.Members() {
		d := m.State()
		now = append(now, d)
		if d.Usable = d.State == alba.DeviceActive; d.Usable && on(d.Device) {
			chosen++
		}
		all = append(all, d)
	}
	if chosen == 0 {
		return 0, nil
	}
	n, err := p.loadNamespace(ctx, ns)
	if err != nil {
		return 0, opError("room", ns, "", err)
	}
	ps, err := LoadPreset(ctx, p.reg, n.Preset)
	if err != nil {
		return 0, opError("room", ns, "", err)
	}
	var room int64
	for _, devices := range [][]place.Device{now, all} {
		c, err := place.Choose(&ps, devices, alba.ID{})
		if err == nil {
			room = max(room, roomOf(&ps, c.Policy, size, min(chosen, c.Policy.Shards())))
		}
	}
	return room, nil
}

// roomOf is what so many shards of an object take at most, as files of storage daemons.
func roomOf(ps *alba.Preset, pol alba.Policy, size int64, shards int) int64 {
	plain := ps.Compression == alba.CompressNone && ps.Encryption == alba.EncryptNone
	if plain && pol.Shards() == 1 && size >= adoptBytes && size%alba.BlockSize == 0 {
		return 0
	}
	unit := alba.Unit(ps.Compression, ps.Encryption)
	l := alba.Layout{K: pol.K, M: pol.M, Unit: unit, Stored: erasure.MaxStored(ps.Compression, ps.Encryption, size)}
	l.FragmentBytes = alba.PlanFragment(l.Stored, pol.K, ps.FragmentBytes, unit)
	var shard int64
	if n := l.Chunks(); n > 0 {
		shard = int64(n-1)*fileRoom(l.FragmentBytes) + fileRoom(l.FragmentLen(n-1))
	}
	return int64(shards) * shard
}

// fileRoom is what a fragment takes: blocks, before them a head with the name and their
// checksums, and a record.
func fileRoom(fragment int) int64 {
	const block, name, record = asd.DefaultBlockSize, 256, 512
	blocks := (fragment + block - 1) / block
	head := (name + 4*blocks + block - 1) / block
	return int64(head+blocks)*block + record
}
