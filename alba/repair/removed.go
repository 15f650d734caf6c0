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
	err := alba.Each(ctx, m.reg, alba.IntentPrefix, func(kv alba.KV) error {
		rec, err := alba.Decode[alba.Intent](kv.Value)
		if err != nil {
			return fmt.Errorf("%s: %w", kv.Key, err)
		}
		for _, id := range rec.Shards {
			delete(removed, id)
		}
		return nil
	})
	if err != nil {
		return err
	}
	err = m.eachObject(ctx, func(man *alba.Manifest) error {
		for _, id := range man.Shards {
			delete(removed, id)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for id := range removed {
		err = errors.Join(err, m.p.ForgetDevice(ctx, id))
	}
	return err
}
