package repair

import (
	"context"
	"errors"
	"fmt"

	"scoria/alba"
)

// forgetRemoved takes the records of removed devices out of the registry that nothing
// refers to, and remembers their IDs. An upload or move that begins now finds its
// places among devices that are in use; one that began before has an intent, and the
// intents are read before the manifests that they become.
func (m *Maintainer) forgetRemoved(ctx context.Context) error {
	removed := map[string]bool{}
	for _, d := range m.p.Fleet().Members() {
		if rec := d.Record(); rec.State == alba.DeviceRemoved {
			removed[rec.ID] = true
		}
	}
	if len(removed) == 0 {
		return nil
	}
	shards, _, err := m.references(ctx, nil)
	if err != nil {
		return err
	}
	for id := range removed {
		if shards[id] == 0 {
			err = errors.Join(err, m.p.ForgetDevice(ctx, id))
		}
	}
	return err
}

// Remove takes a device out of use to which no object, upload or move refers:
// proxy.ErrInUse if one does, proxy.ErrDevice if there is no such device.
func (m *Maintainer) Remove(ctx context.Context, id string) error {
	return m.p.RemoveUnused(ctx, id, func(ctx context.Context) (bool, error) {
		shards, _, err := m.references(ctx, nil)
		return shards[id] > 0, err
	})
}

// references counts the shards on each device, those that manifests speak of and those that
// uploads and moves under way have chosen it for, and the latter's intents. It
// calls fn with each manifest, unless that is nil.
func (m *Maintainer) references(ctx context.Context, fn func(man *alba.Manifest)) (shards map[string]int64, intents int, err error) {
	shards = map[string]int64{}
	under := map[alba.ID]alba.Intent{} // by upload
	err = alba.Each(ctx, m.reg, alba.IntentPrefix, func(kv alba.KV) error {
		rec, err := alba.Decode[alba.Intent](kv.Value)
		if err != nil {
			return fmt.Errorf("%s: %w", kv.Key, err)
		}
		_, upload, err := alba.SplitKey(kv.Key, alba.IntentPrefix)
		if err != nil {
			return err
		}
		intents++
		under[upload] = rec
		return nil
	})
	if err != nil {
		return nil, 0, err
	}
	// After the intents: one that became a manifest meanwhile is met as such.
	err = m.eachObject(ctx, func(man *alba.Manifest) error {
		planned := under[man.Upload].Shards
		delete(under, man.Upload)
		for i, id := range man.Shards {
			shards[id]++
			if i < len(planned) && planned[i] != id {
				shards[planned[i]]++
			}
		}
		if fn != nil {
			fn(man)
		}
		return nil
	})
	for _, rec := range under {
		for _, id := range rec.Shards {
			shards[id]++
		}
	}
	delete(shards, "")
	return shards, intents, err
}
